def function_5(x):
    return x + 5
def function_5(x):
    return x + 5
def function_5(x):
    return x + 5
def function_5(x):
    return x + 5
def function_5(x):
    return x + 5
