"""What has been measured, for people: a page of tables beside the paper's own, charts, and pages of pictures."""
