# %% [markdown]
# # policy

# %%
print(1)
