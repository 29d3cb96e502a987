"""The parts that the scripts use: delivery to the widget maker, charges, the breaker, the maker's widgets and pages."""
