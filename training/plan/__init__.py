"""What a training run will need, by arithmetic alone: `pixnerd plan`."""
