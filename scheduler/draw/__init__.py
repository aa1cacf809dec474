"""A program as pictures: a page that opens in any browser, an SVG file, a DOT file.  docs/pictures.md says how to read them."""
