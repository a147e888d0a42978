"""Bound the error of attention that has read some tokens only coarsely, from numbers kept beside their codes."""
