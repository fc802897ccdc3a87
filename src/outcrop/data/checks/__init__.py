"""The rules of a check, one function a rule, in files by what they look at."""
