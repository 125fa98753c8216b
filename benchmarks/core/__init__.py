"""What all experiments share: keys and records, one runner, one tuner, one training loop."""
