"""What is known of a model's files: shape, pictures, rendering, connector, quantisation, merging."""
