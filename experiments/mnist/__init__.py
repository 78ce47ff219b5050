"""A small convolutional network learns MNIST with `jadam.adam`; see README.md."""
