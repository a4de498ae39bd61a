"""The surroundings in which every part's schema revisions run."""
