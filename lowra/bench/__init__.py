"""What a subset is: files, draws, merging, layer detection."""
