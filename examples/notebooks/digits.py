# %% [markdown]
# # digits

# %%
print(1)
