"""Looking at a results folder: what is planned, what is at work, what will run, what it cost."""
