"""Commands for operators of a running server: they ask its management listener."""
