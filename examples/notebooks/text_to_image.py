# %% [markdown]
# # text_to_image

# %%
print(1)
