"""The search spaces of this library's own methods: what `tune` varies of each, and how far."""

from mrp_lens.methods.search_space import Block, Depth, Factor, Range, Space

BUDGET = Range(0.01, 0.5, log=True)
STEERING: Space = {"layer": Depth(0.1, 0.7), "budget": BUDGET, "lr": Factor(0.2, 5.0)}
RMU_SPACE: Space = {**STEERING, "steering_coeff": Factor(0.25, 4.0)}
ADAPTIVE_RMU_SPACE: Space = {**STEERING, "beta": Range(1.0, 20.0, log=True)}
GRADIENT_ASCENT_SPACE: Space = {"layers": Block(0.1, 0.7, least=3, most=3), "lr": Factor(0.1, 10.0)}
GRADIENT_SPACE: Space = {**GRADIENT_ASCENT_SPACE, "retain_weight": Range(0.3, 30.0, log=True)}
NPO_SPACE: Space = {**GRADIENT_SPACE, "beta": Range(0.03, 1.0, log=True)}
SIMNPO_SPACE: Space = {**GRADIENT_SPACE, "beta": Range(0.5, 10.0, log=True), "gamma": Range(0.0, 2.0)}
UNDIAL_SPACE: Space = {**GRADIENT_SPACE, "strength": Range(1.0, 30.0, log=True)}
MRP_SPACE: Space = {
    "layers": Block(0.0, 1.0, most=8, spread=True),
    "rank": Factor(0.25, 4.0, whole=True),
    "lr": Factor(0.2, 5.0),
    "budget": BUDGET,
    "gate_directions": Range(1, 32, log=True, whole=True),
}
UNCONDITIONAL_MRP_SPACE: Space = {
    "layers": Block(0.3, 1.0, most=4, spread=True),
    "rank": Factor(0.25, 4.0, whole=True),
    "lr": Factor(0.1, 10.0),
    "retain_weight": Range(1.0, 100.0, log=True),
}
ABLATION_SPACE: Space = {"layers": Block(0.2, 1.0, most=4)}
