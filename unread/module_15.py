def function_15(x):
    return x + 15
def function_15(x):
    return x + 15
def function_15(x):
    return x + 15
def function_15(x):
    return x + 15
def function_15(x):
    return x + 15
