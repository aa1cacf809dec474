"""The kernels that read a prompt: matrix products from the weight tape, attention over the cache's own pages, embedding."""
