"""Plain data that several rooms of `bench` share."""
