"""The dot family: convolutions on the machine's products of bytes."""
