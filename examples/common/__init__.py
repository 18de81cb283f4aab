"""What the examples share: options, run directories, training that resumes, samples, curves."""
