"""Does small memory lose anything? MNIST and a language model, float32 against each setting."""
