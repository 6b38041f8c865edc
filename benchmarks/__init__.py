"""What is measured, how, and the results with hardware, versions, commit and command."""
