"""The shift family: convolutions by additions and shifts alone."""
