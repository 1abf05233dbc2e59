"""Studies: many points of a grid."""
