"""Images before they are batches: data sets fetched, verified and read, augmentation, a photo in MNIST's form."""
