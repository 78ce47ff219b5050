"""Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization": figures 1, 2 and 4.

    python -m experiments.papers.kingma_ba_2015 [--figure 1 2 4]

**Figure 1** (section 6.1): logistic regression on MNIST with L2 decay, batches of 128, α/√t.
"Adam yields similar convergence as SGD with momentum and both converge faster than Adagrad."

**Figure 2** (a) (section 6.2): a network of two hidden layers of 1000 ReLU units with dropout.
"Adam shows better convergence than other methods": AdaGrad, RMSProp, SGD Nesterov, AdaDelta.

**Figure 4** (section 6.4): a variational auto-encoder, b1 in {0, .9}, b2 in {.99, .999, .9999},
log10 α in [-5, -1], with and without the bias corrections. "Values β2 close to 1 indeed lead to
instabilities in training when no bias correction term was present, especially at first few epochs
of the training. The best results were achieved with small values of (1-β2) and bias correction;
this was more apparent towards the end of optimization. [...] In summary, Adam performed equal or
better than RMSProp, regardless of hyper-parameter setting": RMSProp is Adam without corrections.

The paper shows of each optimizer the best of "a dense grid", and tells neither the grid, nor its
λ, dropout rates, weights' first values or AdaGrad's schedule. What stands here instead, and what
is smaller so that two cores need about half an hour:

- Figure 1 is whole (45 passes), without its IMDB half. λ = 1e-4. AdaGrad divides by √t itself; it
  is shown with α/√t as the paper writes of all, and with constant α.
- Figure 2 has 12 passes instead of 200 and three learning rates of each. Dropout is 0.5 on
  both hidden layers. Its (b), a comparison with SFO, is left out.
- Figure 4 has images of 14 x 14, 64 hidden units and 10 latent dimensions instead of 28 x 28, 500
  and 50, and 2 and 20 passes instead of 10 and 100.

A training's cost is the mean loss of a pass's batches, dropout and noise included, as it is
minimized. All optimizers start from the same parameters and see the same batches.
"""
