"""Before money is spent: will a run fit, how long does it take, its price (docs/plan.md)."""
