from autoquant.report.tables import describe_bits


def test_the_average_of_all_weights_stands_beside_that_of_the_layers_where_they_differ():
    assert describe_bits(8.0, 8.0) == "8.000 average weight bits"
    found = describe_bits(12.5, 8.0)
    assert found == (
        "12.500 average weight bits (8.000 in the recipe's layers; other weights stay in float)"
    )
