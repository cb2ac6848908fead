"""Hugging Face checkpoints in and out.

families.py says which config of theirs is which of ours, links.py where each of their tensors lies
in our arrays, safetensors.py and store.py are the two file formats, transfer.py moves tensors.
"""
