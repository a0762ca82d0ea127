"""What a careful engineer wants to know of a trained network: ``python -m tools.evaluate --name mnist_model_1``.

    from tools.evaluate.measures import confusion_matrix, fit_temperature, predict
    from tools.evaluate.corruptions import CORRUPTIONS, corrupt

``measures`` are functions on tensors, ``corruptions`` spoils images, ``report`` puts everything together and prints
it, ``figures`` draws it.
"""
