"""What is learnt from images without labels, one file per objective."""
