"""Models in GGUF, the file format of llama.cpp, read into what a Hugging Face checkpoint gives: a configuration, tensors under
Hugging Face's names, a tokenizer and a chat template.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The library of the same name is imported only here, so that
whoever has no such file does without it.
"""
