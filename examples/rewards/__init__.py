"""Rewards: functions `(images, prompts, **arguments) -> a number for each picture`, more being better."""
