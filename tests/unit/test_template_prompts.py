"""A workflow becomes the prompt that ComfyUI's page would queue: small ones, of which that is known."""

from template_prompts import nodes_of, widgets

INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"]]}}},
    "Patch": {"input": {"required": {"model": ["MODEL"], "strength": ["FLOAT", {"default": 1.0}]}}},
    "Sample": {"input": {"required": {"model": ["MODEL"], "seed": ["INT"], "steps": ["INT"], "parts": ["COLORS", {}]}}},
    "Chosen": {
        "input": {
            "required": {
                "how": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "by size", "inputs": {"required": {"size": ["INT"]}}},
                            {"key": "no", "inputs": {}},
                        ]
                    },
                ],
                "last": ["STRING"],
            }
        }
    },
}


def node(number, kind, takes=(), gives=(), values=(), **more):
    """A saved node; `takes` is {name: (type, link)}, `gives` a list of types."""
    inputs = [{"name": name, "type": of, "link": link} for name, (of, link) in dict(takes).items()]
    outputs = [{"name": of, "type": of} for of in gives]
    return {"id": number, "type": kind, "inputs": inputs, "outputs": outputs, "widgets_values": list(values), **more}


LOADER = node(1, "Load", gives=["MODEL"], values=["b"])
SAMPLER = node(3, "Sample", {"model": ("MODEL", 12)}, ["LATENT"], [7, "randomize", 20, ["#fff"]])


def patched(**more):
    """A loader, something in between, and a sampler."""
    between = node(2, "Patch", {"model": ("MODEL", 11)}, ["MODEL"], [0.5]) | more
    return {"nodes": [LOADER, between, SAMPLER], "links": [[11, 1, 0, 2, 0, "MODEL"], [12, 2, 0, 3, 0, "MODEL"]]}


def test_values_go_by_the_order_of_the_widgets_past_what_is_done_with_a_seed():
    nodes = nodes_of(patched(), INFO)
    assert nodes["1"].inputs == {"name": "b"}
    assert nodes["2"].inputs == {"model": ["1", 0], "strength": 0.5}
    assert nodes["3"].inputs == {"model": ["2", 0], "seed": 7, "steps": 20, "parts": {"__value__": ["#fff"]}}
    assert [number for number, each in nodes.items() if each.models] == ["3"]
    assert nodes["3"].samples and not nodes["2"].samples


def test_a_bypassed_node_hands_on_and_a_muted_one_gives_nothing():
    assert nodes_of(patched(mode=4), INFO)["3"].inputs["model"] == ["1", 0]
    muted = nodes_of(patched(mode=2), INFO)
    assert "model" not in muted["3"].inputs and not muted["3"].models and "2" not in muted


def test_a_bypassed_node_hands_on_what_fits_of_several_types():
    bypassed = patched(mode=4)
    bypassed["nodes"][1]["inputs"][0]["type"] = "LATENT,MODEL"
    assert nodes_of(bypassed, INFO)["3"].inputs["model"] == ["1", 0]
    bypassed["nodes"][1]["inputs"][0]["type"] = "LATENT"
    assert "model" not in nodes_of(bypassed, INFO)["3"].inputs


def test_reroutes_and_primitives_are_the_pages_own():
    assert nodes_of(patched(type="Reroute"), INFO)["3"].inputs["model"] == ["1", 0]
    workflow = patched()
    workflow["nodes"][2] = node(3, "Sample", {"steps": ("INT", 13)}, ["LATENT"], [7, "fixed", 20])
    workflow["nodes"].append(node(4, "PrimitiveNode", gives=["INT"], values=[8, "fixed"]))
    workflow["links"] = [[13, 4, 0, 3, 0, "INT"]]
    nodes = nodes_of(workflow, INFO)
    assert nodes["3"].inputs["steps"] == 8 and "4" not in nodes


def subgraph(kind, inside, out):
    """A definition that has `inside` between its first input and its first output."""
    links = [
        {"id": 21, "origin_id": -10, "origin_slot": 0, "target_id": inside["id"], "target_slot": 0, "type": "MODEL"},
        {"id": 22, "origin_id": inside["id"], "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": out},
    ]
    return {"id": kind, "nodes": [inside], "links": links, "inputs": [{"name": "given"}], "outputs": [{"name": out}]}


def test_nodes_in_a_subgraph_in_a_subgraph_are_linked_through_both():
    inner = subgraph("inner", node(5, "Patch", {"model": ("MODEL", 21)}, ["MODEL"], [0.25]), "MODEL")
    outer = subgraph("outer", node(6, "inner", {"given": ("MODEL", 21)}, ["MODEL"]), "MODEL")
    workflow = patched(type="outer", inputs=[{"name": "given", "type": "MODEL", "link": 11}])
    nodes = nodes_of(workflow | {"definitions": {"subgraphs": [inner, outer]}}, INFO)

    assert set(nodes) == {"1", "2:6:5", "3"}
    assert nodes["2:6:5"].inputs == {"model": ["1", 0], "strength": 0.25}
    assert nodes["3"].inputs["model"] == ["2:6:5", 0]


def test_a_named_value_of_the_subgraphs_own_node_counts():
    inside = node(5, "Patch", {"strength": ("FLOAT", 21)}, ["MODEL"], [0.25])
    workflow = patched(type="outer", inputs=[], widgets_values_named={"given": 0.75})
    nodes = nodes_of(workflow | {"definitions": {"subgraphs": [subgraph("outer", inside, "MODEL")]}}, INFO)
    assert nodes["2:5"].inputs["strength"] == 0.75


def test_without_a_name_the_first_widget_inside_gives_its_value_to_all_that_the_input_is_for():
    inside = node(5, "Patch", {"strength": ("FLOAT", 21)}, ["MODEL"], [0.25])
    definition = subgraph("outer", inside, "MODEL")
    shown = node(6, "Show", {"anything": ("*", 23)})
    definition["nodes"] = [shown, inside]
    link = {"id": 23, "origin_id": -10, "origin_slot": 0, "target_id": 6, "target_slot": 0, "type": "FLOAT"}
    definition["links"] = [link, *definition["links"]]
    workflow = patched(type="outer", inputs=[], widgets_values=[])
    nodes = nodes_of(workflow | {"definitions": {"subgraphs": [definition]}}, INFO)
    assert nodes["2:6"].inputs == {"anything": 0.25} and nodes["2:5"].inputs["strength"] == 0.25


def test_a_choice_brings_its_own_widgets():
    for values, expected in (
        (["by size", 64, "end"], {"how": "by size", "how.size": 64, "last": "end"}),
        (["no", "end"], {"how": "no", "last": "end"}),
    ):
        workflow = {"nodes": [node(1, "Chosen", values=values)], "links": []}
        assert nodes_of(workflow, INFO)["1"].inputs == expected


def test_a_mask_that_is_painted_is_a_value_like_others():
    painted = {"mask": ["STRING", {"default": "", "widgetType": "PAINTER"}], "width": ["INT"], "height": ["INT"]}
    workflow = {"nodes": [node(1, "Paint", values=["painted.png", 64, 32])], "links": []}
    inputs = nodes_of(workflow, {"Paint": {"input": {"required": painted}}})["1"].inputs
    assert inputs == {"mask": "painted.png", "width": 64, "height": 32}


def test_what_this_comfyui_lacks_keeps_its_links():
    assert nodes_of(patched(type="Newer"), INFO)["2"].inputs == {"model": ["1", 0]}
    assert list(widgets({})) == []
