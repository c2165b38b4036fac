"""What can be concluded from a number of trials: errors, tests, and how many trials it takes."""
