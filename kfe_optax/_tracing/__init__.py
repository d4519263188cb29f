"""From a loss to its layers: following parameters, rules and adapters, grouping uses, rebuilding with tags."""
