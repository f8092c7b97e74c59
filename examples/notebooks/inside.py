# %% [markdown]
# # inside

# %%
print(1)
