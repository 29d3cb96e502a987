"""What the scripts stand on: delivery to the widget maker, charges, the breaker, the maker's own widgets and pages."""
