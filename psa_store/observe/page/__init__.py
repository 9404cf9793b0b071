"""The controller's web page."""
