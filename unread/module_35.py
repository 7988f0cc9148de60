def function_35(x):
    return x + 35
def function_35(x):
    return x + 35
def function_35(x):
    return x + 35
def function_35(x):
    return x + 35
def function_35(x):
    return x + 35
