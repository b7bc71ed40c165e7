"""Training data: sources of pictures and captions, buckets, the cache of latents and embeddings, and batches."""
