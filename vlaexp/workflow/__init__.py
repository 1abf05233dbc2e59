"""What joins the floors: one short file per verb."""
