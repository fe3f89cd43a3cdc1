"""The layers of the model, each a function that adds its equations to a program."""
