"""Images of any form to training data: found, read, cropped, and encoded once."""
