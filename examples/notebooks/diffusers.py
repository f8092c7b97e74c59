# %% [markdown]
# # diffusers

# %%
print(1)
