"""Adam and eleven other optimizers walk down functions of two variables: paths, losses, a race."""
