"""From a loss to its layers: following parameters, rules, grouping uses, rebuilding with tags."""
