"""What adapter files look like: config fields, tensor names, layouts, spellings. Nothing here runs a model.

`config` reads the fields of LoraConfig, `names` the names of tensors, `layouts` turns the tensors of one adapted module
into two-dimensional sites and back, `structure` says what modules and parameters the host has, `targets` puts these
together, and `spelling` and `carried` treat what other tools write and what is no low-rank update.
"""
