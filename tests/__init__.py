"""What holds the project to its word: a folder a package, `support` for what they share, `gpu` for what needs a GPU, and
`mutations`, the campaign against the checker."""
