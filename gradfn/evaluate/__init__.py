"""Whether attribution tells the truth: what retraining says, and how scores compare with it."""
