"""Methods that predict something for every pixel, in Python: there is no command for them yet."""
