"""What becomes of samples: segmentations at the photo's size, the tree of answers and its fitting, pictures,
scores."""
