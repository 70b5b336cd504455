"""The lumbar kit's sections; `utils` is their front and holds the table of contents."""
